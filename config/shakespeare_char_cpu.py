# Tiny Shakespeare by character, for a CPU: 0.8M parameters, one to two minutes on 2 cores.
#   python train.py config/shakespeare_char_cpu.py
#   python train.py config/shakespeare_char_cpu.py --kv_shift=none --out_dir=out/shakespeare_vanilla
out_dir = "out/shakespeare_char_cpu"
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
checkpoint_every = 500
log_every = 50
