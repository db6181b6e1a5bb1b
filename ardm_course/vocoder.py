from dataclasses import asdict, dataclass
import torch
from torch import Tensor, nn
from ardm_course.audio import LogMel, MelConfig

@dataclass
class MelCodecConfig:
    "temporary"
    vocoder: str = "griffin-lim"
    iterations: int = 32

class MelCodec(nn.Module):
    "temporary"
    def __init__(self, config: MelCodecConfig):
        super().__init__()
        self.config, self.mel = config, LogMel(MelConfig())
        self.register_buffer("mean", torch.zeros(80))
        self.register_buffer("std", torch.ones(80))

    def fit_statistics(self, mels):
        frames = torch.cat([m for m in mels])
        self.mean, self.std = frames.mean(0), frames.std(0)

    def encode(self, wav: Tensor) -> Tensor: return (self.mel(wav) - self.mean) / self.std

    def to_dict(self) -> dict: return {"vocoder": "griffin-lim", "iterations": 32, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, values: dict):
        codec = cls(MelCodecConfig())
        codec.mean, codec.std = torch.tensor(values["mean"]), torch.tensor(values["std"])
        return codec
