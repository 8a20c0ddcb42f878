"""Making a checkpoint: data, pretraining, fine-tuning. Needs PyTorch (the extra ``train``); preparing data does not."""
