"""The exchange between ranks: what knows `torch.distributed`, and no trainer."""
