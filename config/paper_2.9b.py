# The paper's 2.9B model: 500B tokens. OpenWebText (9B tokens, read 55 times) and GPT-2's tokenizer
# replace the paper's private data and tokenizer (48,000 ids). Meant for eight 80 GB GPUs or more.
#   torchrun --nproc_per_node=8 train.py config/paper_2.9b.py
out_dir = "out/paper_2.9b"
dataset = "openwebtext"
vocab_size = 50_304  # GPT-2's 50,257, up to a multiple of 64
n_layer = 32
n_head = 20
n_kv_head = 4
n_embd = 2560
ffn_size = 8704
block_size = 4096
tie_embeddings = False
batch_size = 4096
micro_batch_size = 1
max_steps = 29_802
learning_rate = 8e-4
lr_schedule = "constant"
warmup_steps = 600
eval_every = 500
eval_tokens = 10_485_760
checkpoint_every = 500
fsdp = True
