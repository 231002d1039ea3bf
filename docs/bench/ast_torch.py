#!/usr/bin/env python3
"""Tokens a second of training a 2:4 model against its dense teacher in PyTorch: what `--example ast` does, by a peer.

    python ast_torch.py MODEL TRAIN.txt [STEPS] [WINDOW]

Needs torch, transformers and tokenizers; runs on the processor in single precision, on all cores (OMP_NUM_THREADS).
Masks by magnitude, found again every 10 steps, straight-through derivatives, kd = 2/3 at temperature 2, AdamW with the decay of
dropped weights in its update, 8 windows a step in one batch.
"""
import json
import resource
import sys
import time

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

MODEL, TEXT = sys.argv[1], sys.argv[2]
STEPS = int(sys.argv[3]) if len(sys.argv) > 3 else 20
WINDOW = int(sys.argv[4]) if len(sys.argv) > 4 else 256
BATCH, KD, T, RATE, DECAY, B1, B2 = 8, 2 / 3, 2.0, 5e-4, 6e-5, 0.9, 0.95


class Kept(torch.autograd.Function):
    """W * M on the way there, all of the derivative on the way back."""

    @staticmethod
    def forward(ctx, weight, mask):
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def mask_of(weight):
    quads = weight.abs().reshape(-1, 4)
    kept = torch.zeros_like(quads).scatter_(1, quads.topk(2, dim=1).indices, 1.0)
    return kept.reshape(weight.shape)


class Sparse(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().clone())
        self.mask = mask_of(self.weight.detach())

    def forward(self, x):
        return torch.nn.functional.linear(x, Kept.apply(self.weight, self.mask))


def main():
    load = lambda: AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    teacher, student = load(), load()
    for parameter in list(teacher.parameters()) + list(student.parameters()):
        parameter.requires_grad_(False)
    matrices = []
    for layer in student.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    sparse = Sparse(child)
                    setattr(module, name, sparse)
                    matrices.append(sparse)
    norms = [p for n, p in student.named_parameters() if n.endswith("norm.weight")]
    for norm in norms:
        norm.requires_grad_(True)
    trained = [m.weight for m in matrices] + norms
    masks = {id(m.weight): m for m in matrices}
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    with open(TEXT) as file:
        text = file.read(STEPS * BATCH * (WINDOW + 1) * 6)
    ids = torch.tensor(Tokenizer.from_file(MODEL + "/tokenizer.json").encode(text, add_special_tokens=False).ids)
    windows = [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - WINDOW - 1, WINDOW)]
    started, tokens = None, 0
    for step in range(STEPS):
        if step == 2:
            started, cpu = time.time(), time.process_time()
        batch = torch.stack([windows[(step * BATCH + i) % len(windows)] for i in range(BATCH)])
        with torch.no_grad():
            of_teacher = torch.log_softmax(teacher(batch[:, :-1]).logits.flatten(0, 1) / T, -1)
        logits = student(batch[:, :-1]).logits.flatten(0, 1)
        kl = torch.nn.functional.kl_div(
            torch.log_softmax(logits / T, -1), of_teacher, log_target=True, reduction="batchmean"
        )
        loss = KD * T * T * kl + (1 - KD) * torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        with torch.no_grad():
            for parameter, (m, v) in zip(trained, moments):
                m.lerp_(parameter.grad, 1 - B1)
                update = m
                if id(parameter) in masks:
                    update = m + DECAY * (1 - masks[id(parameter)].mask) * parameter
                v.mul_(B2).addcmul_(update, update, value=1 - B2)
                t = step + 1
                parameter.addcdiv_(update / (1 - B1**t), (v / (1 - B2**t)).sqrt().add_(1e-10), value=-RATE)
                parameter.grad = None
            if (step + 1) % 10 == 0:
                for matrix in matrices:
                    matrix.mask = mask_of(matrix.weight)
        tokens += BATCH * WINDOW if started else 0
    seconds, cpu = time.time() - started, time.process_time() - cpu
    print(json.dumps({
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "cpu_seconds": round(cpu, 2),
        "tokens_per_two_cpu_seconds": round(2 * tokens / cpu, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "loss": round(float(loss), 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }))


main()
