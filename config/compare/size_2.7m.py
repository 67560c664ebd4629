# 2.7M parameters without embeddings. Figure 7a; the loop is in size_0.03m.py.
n_layer = 6
n_head = 6
n_embd = 192
