# 0.8M parameters without embeddings. Figure 7a; the loop is in size_0.03m.py.
n_layer = 4
n_head = 4
n_embd = 128
