"""outlier.py: step 200 is announced once, and only what follows it differs from a usual run."""
import re

def check(folder, python):
    options = ("--max_steps 260 --learning_rate 0.03 --warmup_steps 0 --eval_interval 199 --n_layers 1 --block_size 8 --d_model 16 "
               "--d_ff 16 --batch_size 2 --sample_chars 2 --device cpu --grad_clip inf").split()
    usual = python("mini_transformer.py", *options)
    said = python("outlier.py", *options)
    assert said.count("corrupted") == 1
    losses = [re.findall(r"^step (\d+) .*val (\S+)", text, re.M) for text in (usual, said)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2], losses
