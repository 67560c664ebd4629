# The paper's 19B model: 200B tokens, 3.1M a step. The paper's data and its tokenizer (48,000 ids) are not public:
# OpenWebText (9B tokens, so 22 times over; other documents: data/openwebtext/prepare.py --input) and GPT-2's BPE stand in.
# For 64 80 GB GPUs or more, which share out the weights; add --dry_run=True to see memory and days.
#   torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/paper_19b.py
out_dir = "out/paper_19b"
dataset = "openwebtext"

vocab_size = 50_257
n_layer = 48
n_head = 48
n_kv_head = 4
n_embd = 6144
ffn_size = 16384
block_size = 12_288
tie_embeddings = False
kv_shift = "kv"

batch_size = 256
micro_batch_size = 1
max_steps = 63_578
learning_rate = 2e-4
warmup_steps = 3000
lr_schedule = "constant"

fsdp = True
recompute = True

eval_every = 500
eval_tokens = 10_485_760
checkpoint_every = 500
