# The depth experiment in seconds: narrow models, one seed, one sequence length. Enough to see the order of the curves.
#   python induction_toy.py config/toy_quick.py
out_dir = "out/toy_quick"
seeds = 1
vocab_size = 16
length = 16
min_prefix = 4
max_prefix = 8
width = 32
n_head = 2
max_steps = 400
batch_size = 16
learning_rate = 4e-3
