# Tiny Shakespeare by character, for a GPU: a 10.6M-parameter model, some minutes.
#   python train.py config/shakespeare_char.py
out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2  # the corpus is small: without it the model learns it by heart

batch_size = 64
max_steps = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100

eval_every = 250
eval_tokens = 0  # the whole of val
checkpoint_every = 500
