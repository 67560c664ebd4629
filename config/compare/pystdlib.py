# Comparisons on the source of Python's standard library, byte by byte: the model of config/quickstart.py,
# with AdamW, two to three minutes a run on 2 CPU cores. To be followed by a file that says what is compared, as in
#   python train.py config/compare/pystdlib.py config/compare/k_only.py --out_dir=out/compare/pystdlib-k_only-1
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
max_steps = 1000
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 50

eval_every = 250
eval_tokens = 131_072
eval_induction = True
checkpoint_every = 250
log_every = 25
