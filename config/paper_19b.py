# The paper's 19B model: 200B tokens. OpenWebText (9B tokens, read 22 times) and GPT-2's tokenizer
# replace the paper's private data and tokenizer (48,000 ids). Meant for 64 80 GB GPUs or more.
#   torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#     train.py config/paper_19b.py
out_dir = "out/paper_19b"
dataset = "openwebtext"
vocab_size = 50_304  # GPT-2's 50,257, up to a multiple of 64
n_layer, n_head, n_kv_head, n_embd, ffn_size = 48, 48, 4, 6144, 16384
block_size = 12_288
tie_embeddings = False
batch_size, micro_batch_size = 256, 1
max_steps = 63_578
learning_rate, lr_schedule, warmup_steps = 2e-4, "constant", 3000
eval_every = checkpoint_every = 500
eval_tokens = 10_485_760
fsdp = True
recompute = True
