"""Logit adjustment after training (Menon et al., ICLR 2021). Adjustment of the loss, from the same paper, is `bc`.

Read: google-research/google-research logit_adjustment/{main,utils,models}.py (at 1d4d2f1 and 5b09c22) and its README.
TensorFlow; read, not run. The code adds 1e-12 to the powers of the prior, ours does not.

Published, ResNet-32 with bottleneck blocks and about 120,000 steps, imbalance 100, CIFAR-10/100-LT: without adjustment
71.36 / 39.87, adjusted after training 77.32 / 44.07, adjusted loss 77.89 / 44.06.
"""
