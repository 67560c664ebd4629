# Figures 5b and 5c, learning rates, constant after warm-up as in the paper, whose vanilla model diverges at 1e-2. Small
# models bear more:
#   for v in vanilla kv; do for r in 1e-3 1e-2 3e-2 1e-1; do for s in 1 2 3; do python train.py config/compare/shakespeare.py \
#     config/compare/$v.py config/compare/learning_rates.py --learning_rate=$r --seed=$s \
#     --out_dir=out/compare/shakespeare-rate-$r-$v-$s; done; done; done
#   python plot.py out/compare/shakespeare-rate-*-{vanilla,kv}-* --x=learning_rate
lr_schedule = "constant"
min_lr = 0.0
max_steps = 300
