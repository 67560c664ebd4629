# Multi-hop induction at the paper's size (Figure 9): up to 16 hops in 100 letters, 2 to 6 layers, 100k steps. For one GPU.
#   python induction_toy.py config/toy_hop_paper.py --workers=2
# The paper does not state the sequences a step: chosen here.
experiment = "hop"
out_dir = "out/toy_hop_paper"
seeds = 1
width = 128
n_head = 4
hop_max = 16
hop_letters = 4
hop_length = 100
hop_depths = "2 3 4 5 6"
hop_steps = 100_000
batch_size = 256
learning_rate = 1e-4
warmup_steps = 1000
eval_every = 1000
eval_sequences = 4096
