# Tiny Shakespeare by character: a 0.8M-parameter model, one to two minutes on 2 CPU cores. The loss
# is that of the whole val split.
#   python train.py config/shakespeare_char_cpu.py
#   python train.py config/shakespeare_char_cpu.py --kv_shift=none --out_dir=out/shakespeare_vanilla
out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
eval_tokens = 0
checkpoint_every = 500
log_every = 50
