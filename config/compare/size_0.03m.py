# 0.03M parameters without embeddings. Figure 7a; the loop is in size_0.1m.py.
n_layer = 2
n_head = 2
n_embd = 32
