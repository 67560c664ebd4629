# The paper's 2.9B model: 500B tokens. OpenWebText (9B tokens, read 55 times) and GPT-2's tokenizer
# replace the paper's private data and tokenizer (48,000 ids). Meant for eight 80 GB GPUs or more.
#   torchrun --nproc_per_node=8 train.py config/paper_2.9b.py
out_dir = "out/paper_2.9b"
dataset = "openwebtext"
vocab_size = 50_304  # GPT-2's 50,257, up to a multiple of 64
n_layer, n_head, n_kv_head, n_embd, ffn_size = 32, 20, 4, 2560, 8704
block_size = 4096
tie_embeddings = False
batch_size, micro_batch_size = 4096, 1
max_steps = 29_802
learning_rate, lr_schedule, warmup_steps = 8e-4, "constant", 600
eval_every = checkpoint_every = 500
eval_tokens = 10_485_760
fsdp = True
