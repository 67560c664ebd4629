# A small model on the source of your own Python's standard library, byte by byte:
# two to three minutes on 2 CPU cores, nothing to download.
#   python train.py config/quickstart.py
out_dir = "out/quickstart"
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
kv_shift = "kv"

batch_size = 16
max_steps = 800
optimizer = "muon"  # its steps take a quarter longer here, and are worth it
learning_rate = 1e-2
min_lr = 1e-3
warmup_steps = 50

eval_every = 250
eval_tokens = 131_072
checkpoint_every = 250
log_every = 25
