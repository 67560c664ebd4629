# The paper's 2.9B model: 500B tokens, 16.8M a step. The paper's data and its tokenizer (48,000 ids) are not public:
# OpenWebText (9B tokens, so 55 times over; other documents: data/openwebtext/prepare.py --input) and GPT-2's BPE stand in.
# For eight 80 GB GPUs or more, which share out the weights; add --dry_run=True to see memory and days.
#   torchrun --nproc_per_node=8 train.py config/paper_2.9b.py
out_dir = "out/paper_2.9b"
dataset = "openwebtext"

vocab_size = 50_257
n_layer = 32
n_head = 20
n_kv_head = 4
n_embd = 2560
ffn_size = 8704
block_size = 4_096
tie_embeddings = False
kv_shift = "kv"

batch_size = 4096
micro_batch_size = 1
max_steps = 29_802
learning_rate = 8e-4
warmup_steps = 600
lr_schedule = "constant"

fsdp = True

eval_every = 500
eval_tokens = 10_485_760
checkpoint_every = 500
