# Comparisons on tiny Shakespeare by character: the model and the steps of config/shakespeare_char_cpu.py, one to two
# minutes a run on 2 CPU cores. A second file says what is compared, and the loop in it runs the set; as in
#   python train.py config/compare/shakespeare.py config/compare/k_only.py --out_dir=out/compare/shakespeare-k_only-1
# Put pystdlib for shakespeare in any of the loops to have it on another corpus. What is complete is not run again.
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
max_steps = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100

eval_every = 250
eval_tokens = 0  # the whole of val
eval_induction = True
checkpoint_every = 500
log_every = 50
