# GPT-2's small size on OpenWebText: 12 layers, 12 heads, width 768, context 1024, 491,520 tokens a step.
# 20,000 steps are 9.8B tokens, a little over one epoch. Lower micro_batch_size if the GPU's memory does not do.
#   python train.py config/gpt2.py
out_dir = "out/gpt2"
dataset = "openwebtext"

vocab_size = 50_257
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
