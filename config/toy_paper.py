# Depth at the paper's size (Figure 1a): width 1024, vocabulary 8,000, length 512. For one GPU:
#   python induction_toy.py config/toy_paper.py
# The paper does not state heads, steps, optimizer and prefix lengths: they are chosen here.
experiment = "depth"
out_dir = "out/toy_paper"
seeds = 1
vocab_size = 8000
length = 512
min_prefix = 64
max_prefix = 256
width = 1024
n_head = 16
batch_size = 4096  # sequences, 2.1M tokens per step
micro_batch_size = 64
learning_rate = 2e-4
warmup_steps = 1000
max_steps = 3000
eval_every = 50
