# The paper's 13B model: 10B tokens, 2.1M a step. The paper's data and its tokenizer (36,000 ids) are not public:
# OpenWebText and GPT-2's BPE stand in.
# For eight 80 GB GPUs or more, which share out the weights; add --dry_run=True to see memory and days.
#   torchrun --nproc_per_node=8 train.py config/paper_13b.py
out_dir = "out/paper_13b"
dataset = "openwebtext"

vocab_size = 50_257
n_layer = 40
n_head = 40
n_embd = 5120
ffn_size = 13824
block_size = 2_048
tie_embeddings = False
kv_shift = "kv"

batch_size = 1024
micro_batch_size = 4
max_steps = 4_768
learning_rate = 2e-4
warmup_steps = 1000
lr_schedule = "constant"

fsdp = True
recompute = True

eval_every = 500
eval_tokens = 10_485_760
checkpoint_every = 500
