"""Checkpoints that belong to the model, not to the layout that wrote them.

    step-00001000/rank-00000.safetensors …   the pieces that a rank owned: fp32, readable by the safetensors library
    step-00001000/manifest.json              written last: which piece holds what, and a checksum of everything

`write.save_checkpoint` saves, `restore.restore_newest` goes on from the newest valid one, `read.open_checkpoint` is for
everybody else. This package knows `Piece`s; it does not know layouts, engines or torch.distributed. No pickle anywhere.
"""
