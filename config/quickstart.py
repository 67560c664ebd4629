# A small model on the source of Python's standard library, byte by byte. Nothing to download; it
# takes 1.6 to 3.7 minutes on 2 CPU cores.
#   python train.py config/quickstart.py
out_dir = "out/quickstart"
n_layer = 4
n_head = 4
n_embd = 128
shift_init = "induction"  # learns sooner than the paper's random start, "uniform"
block_size = 128
batch_size = 16
max_steps = 800
optimizer = "muon"
learning_rate = 1e-2
min_lr = 1e-3
warmup_steps = 50
eval_every = 400
eval_tokens = 131_072
log_every = 25
