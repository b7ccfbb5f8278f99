"""Focal loss (Lin et al., ICCV 2017) on the softmax, as long-tailed recognition uses it.

Read: kaidic/LDAM-DRW@2536330 losses.py; hyperconnect/LADE@5db5d13 loss/FocalLoss.py. The paper itself, on object
detection, has a sigmoid for each class; that form with class weights is `cb_focal`, in `class_balanced.py`.

Readings: the exponent is 1, as in LDAM's code (LADE's has 2), and the gradient passes through the modulator (LADE's and
GCL's code stop it there).

Published, top-1 at imbalance 100 (LDAM's paper, CIFAR-10/100-LT, ResNet-32, best test epoch): 70.4 / 38.4.
"""
