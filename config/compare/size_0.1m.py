# 0.1M parameters without embeddings. Figure 7a; the loop is in size_0.03m.py.
n_layer = 2
n_head = 2
n_embd = 64
