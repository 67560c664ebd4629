# GPT-2 small (124M parameters) on OpenWebText: 9.8B tokens, a little over one epoch. Lower
# micro_batch_size if the memory of the GPU is too small.
#   torchrun --nproc_per_node=8 train.py config/gpt2.py
out_dir = "out/gpt2"
dataset = "openwebtext"
vocab_size = 50_304  # GPT-2's 50,257, up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 480
micro_batch_size = 12
max_steps = 20_000
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
eval_every = 1000
eval_tokens = 10_485_760
checkpoint_every = 1000
