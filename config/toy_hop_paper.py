# Multi-hop induction at the paper's size (Figure 9): up to 16 hops, 2 to 6 layers. For one GPU:
#   python experiments/hop.py config/toy_hop_paper.py --workers=2
# The paper does not state the sequences per step: they are chosen here.
out_dir = "out/toy_hop_paper"
seeds = 1
max_hops = 16
letters = 4
length = 100
max_layers = 6
width = 128
n_head = 4
max_steps = 100_000
batch_size = 256
learning_rate = 1e-4
warmup_steps = 1000
eval_every = 1000
eval_sequences = 4096
