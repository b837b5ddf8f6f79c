"""Block by block: the memory and time of a checkpoint larger than memory, and perplexity beside the whole-model way.

    python examples/benchmarks/blockwise.py memory [--blocks 59] [--limit 1.5] [--folder /tmp/blockwise]
    FXPRUNE_DATA=... python examples/benchmarks/blockwise.py perplexity [--shares 0.8 0.5] [--ways blocks whole]

`memory` writes a random LLaMA of 59 blocks of width 1,280 (3 GB), block by block, and prunes it to half in a process
whose peak of resident memory is measured; where the system lets it make a control group, that limits it, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

WIDTH, HIDDEN, HEADS, WORDS = 1280, 2048, 10, 4096
LENGTH = 64
GROUP = Path("/sys/fs/cgroup/memory/fxprune-blockwise")


def config(blocks: int) -> Any:
    """The configuration of the random LLaMA."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=1024,
        architectures=["LlamaForCausalLM"], dtype="float32", bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def write(folder: Path, blocks: int) -> int:
    """Write the checkpoint, one block in memory at a time; returns its bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True)
    config(blocks).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config(blocks)).state_dict().items()}
    owner = {name: ".".join(name.split(".")[:3]) if ".layers." in name else "rest" for name in shapes}
    files, total = sorted(set(owner.values())), 0
    index: dict[str, str] = {}
    for number, of in enumerate(files, 1):
        file, own = f"model-{number:05d}-of-{len(files):05d}.safetensors", [n for n in shapes if owner[n] == of]
        ones = {name: len(shapes[name]) == 1 for name in own}
        tensors = {n: torch.ones(shapes[n]) if ones[n] else 0.02 * torch.randn(shapes[n]) for n in own}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def batches(samples: int) -> list[torch.Tensor]:
    """Random words."""
    words = torch.randint(3, WORDS, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    return list(words.split(4))


def prune(folder: Path, compensate: str, samples: int) -> None:
    """Prune the checkpoint to half, and print the times of the blocks and the peak of resident memory as JSON."""
    from fxprune.integrations import blockwise

    times, start = dict[str, list[float]](), time.perf_counter()

    def note(record: logging.LogRecord) -> bool:
        nonlocal start
        now = time.perf_counter()
        times.setdefault(record.getMessage().split()[0], []).append(now - start)
        start = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{record.getMessage()}: {times[record.getMessage().split()[0]][-1]:.1f} s, {peak:.2f} GiB", flush=True)
        return True

    logger = logging.getLogger("fxprune.integrations.blockwise")
    logger.setLevel(logging.INFO)
    handler = logging.NullHandler()
    handler.addFilter(note)
    handler.handle = note  # type: ignore[method-assign, assignment]
    logger.addHandler(handler)
    blockwise.compress_folder(
        folder / "whole", folder / "half", batches(samples), params=0.5, memory=1 << 28, compensate=compensate
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak": peak, "times": {name: sorted(t)[len(t) // 2] for name, t in times.items()}}))


@torch.no_grad()
def forward_time(samples: int) -> float:
    """The time of one block on the samples."""
    from transformers import LlamaModel

    model = LlamaModel(config(1)).eval()
    model(batches(samples)[0])
    start = time.perf_counter()
    for words in batches(samples):
        model(words)
    return time.perf_counter() - start


def memory(blocks: int, limit: float, folder: Path, compensate: str, samples: int) -> None:
    """Write, prune under a limit, check, and print."""
    from transformers import AutoModelForCausalLM

    if not (folder / "whole").exists():
        print(f"checkpoint: {write(folder / 'whole', blocks) / 1e9:.2f} GB in {blocks} blocks")
    limited = False
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(int(limit * 2**30)))
        limited = True
    except OSError:
        print("no control group can be made here: the peak is measured, and not limited")
    join = f"import os;open('{GROUP}/tasks','w').write(str(os.getpid()));" if limited else ""
    code = f"{join}import sys;sys.path.insert(0,{str(Path(__file__).parent)!r});import blockwise,pathlib;"
    code += f"blockwise.prune(pathlib.Path({str(folder)!r}), {compensate!r}, {samples})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if limited:
        most = int((GROUP / "memory.max_usage_in_bytes").read_text()) / 2**30
        print(f"limit of the control group: {limit} GiB, of which {most:.2f} were used, file pages included")
        GROUP.rmdir()
    print(f"peak of resident memory: {found['peak']:.2f} GiB")
    print(
        f"a block: forward {forward_time(samples):.2f} s, "
        + ", ".join(f"{n} {t:.2f} s" for n, t in found["times"].items())
    )
    small = AutoModelForCausalLM.from_pretrained(folder / "half")
    print(f"loaded again: {sum(p.numel() for p in small.parameters()):,} parameters")


def perplexity(shares: list[float], ways: list[str], allocate: str) -> None:
    """Perplexity of the small LLaMA at shares of its parameters outside of the embedding, by both ways."""
    import oneshot_real
    from transformers import AutoModelForCausalLM

    from fxprune.integrations.blockwise import compress_folder
    from fxprune.integrations.huggingface import compress_pretrained

    task = oneshot_real.language()
    model: Any = task.model.model
    whole, embedding = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.embed_tokens))
    print(f"original: {task.measure(task.model):.2f}", flush=True)
    for share in shares:
        params = (share * (whole - embedding) + embedding) / whole
        for way in ways:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                if way == "blocks":
                    model.save_pretrained(f"{folder}/whole")
                    words = [x for x, _ in task.calibration]
                    compress_folder(f"{folder}/whole", f"{folder}/small", words, params=params, allocate=allocate)
                    small: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
                else:
                    told = [{"input_ids": x, "labels": x} for x, _ in task.calibration]
                    small = compress_pretrained(model, told, params=params, plain=True, progress=False)
            found, seconds = task.measure(oneshot_real.NextToken(small).eval()), time.perf_counter() - start
            kept = sum(p.numel() for p in small.parameters()) - embedding
            widths = small.config.num_key_value_heads, small.config.intermediate_size
            print(
                f"{share} {way}: {found:.2f}, {kept / (whole - embedding):.3f} kept, {widths}, {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    """Read the command line."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "perplexity"))
    parser.add_argument("--blocks", type=int, default=59)
    parser.add_argument("--limit", type=float, default=1.5, help="GiB")
    parser.add_argument("--samples", type=int, default=16, help=f"of {LENGTH} tokens")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "blockwise")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--ways", nargs="+", default=["blocks", "whole"], choices=("blocks", "whole"))
    parser.add_argument("--allocate", default="uniform", choices=("measured", "uniform"))
    parser.add_argument("--compensate", default="sequential", choices=("sequential", "none"))
    given = parser.parse_args()
    if given.what == "perplexity":
        return perplexity(given.shares, given.ways, given.allocate)
    try:
        memory(given.blocks, given.limit, given.folder, given.compensate, given.samples)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
