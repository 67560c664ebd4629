# Multi-hop induction (Figure 9) on a CPU: up to 4 hops in 50 letters, one seed, in minutes.
#   python induction_toy.py config/toy_hop.py
experiment = "hop"
out_dir = "out/toy_hop"
seeds = 1
eval_every = 100
