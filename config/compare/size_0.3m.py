# 0.3M parameters without embeddings. Figure 7a; the loop is in size_0.03m.py.
n_layer = 3
n_head = 3
n_embd = 96
