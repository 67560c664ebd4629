# Tiny Shakespeare by character: a 10.6M-parameter model, a few minutes on a GPU. The corpus is
# small, so dropout keeps the model from memorizing it. The loss is that of the whole val split.
#   python train.py config/shakespeare_char.py
out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
dropout = 0.2
batch_size = 64
max_steps = 5000
eval_tokens = 0
checkpoint_every = 500
