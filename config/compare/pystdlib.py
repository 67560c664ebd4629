# Comparisons on the source of Python's standard library, byte by byte, with a context long enough for induction to be worth
# learning: about five minutes a run on a CPU. To be followed by a file that says what is compared:
#   for v in vanilla kv k_only v_only gate clamp window3 per_channel; do for s in 1 2 3; do
#     python train.py config/compare/pystdlib.py config/compare/$v.py --seed=$s --out_dir=out/compare/pystdlib-$v-$s
#   done; done
#   python plot.py out/compare/pystdlib-{vanilla,kv,k_only,v_only}-*
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 256

batch_size = 8
max_steps = 1500
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 50

eval_every = 150
eval_tokens = 131_072
eval_induction = True
checkpoint_every = 500
log_every = 25
compile = True  # takes a minute, and saves more
