# The paper's 1.5B model: 10B tokens. OpenWebText and GPT-2's tokenizer replace the paper's private
# data and tokenizer (36,000 ids). It fits on one 80 GB GPU; eight are faster.
#   torchrun --nproc_per_node=8 train.py config/paper_1.5b.py
out_dir = "out/paper_1.5b"
dataset = "openwebtext"
vocab_size = 50_304  # GPT-2's 50,257, up to a multiple of 64
n_layer, n_head, n_embd, ffn_size = 28, 16, 2048, 5504
block_size = 2048
tie_embeddings = False
batch_size, micro_batch_size = 512, 4
max_steps = 9_537
learning_rate, lr_schedule, warmup_steps = 2e-4, "constant", 1000
eval_every = checkpoint_every = 500
eval_tokens = 10_485_760
