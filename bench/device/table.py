"""The results of `bench.device.run` as one table of plain text."""

from __future__ import annotations

from typing import Any


def render(results: dict[str, Any]) -> str:
    lines: list[str] = []
    machine = results.get("machine", {})
    lines += [f"{name:8} {machine[name]}" for name in ("gpu", "cpu", "python", "plugin", "engine") if machine.get(name)]
    for step, result in results.items():
        lines += ["", f"{step} ({result['seconds_taken']} s)"]
        if "failed" in result:
            lines += [f"  FAILED: {result['failed']}", *(f"    {line}" for line in result["said"])]
            continue
        kind = step.split()[0]
        if kind.startswith("tests/"):
            lines.append(f"  {result['tests']}")
        elif kind == "text":
            lines.append(f"  the same as plain: {result['same']} of {result['of']}")
            differing = {name: first for name, first in result["first_difference"].items() if first is not None}
            lines += [f"  {name}: differs from token {first} on" for name, first in differing.items()]
        elif kind == "bits":
            lines += [
                f"  {name:28} {row['rows']:4} of {row['of_rows']} rows, {row['bits']} of {row['of_bits']} bits, "
                f"greatest {row['greatest']:.1e}, another best token in {row['other_choice']}"
                for name, row in result.items()
                if isinstance(row, dict)
            ]
        elif kind == "operations":
            for name, found in result.items():
                if isinstance(found, dict):
                    says = "differ" if found["logits_differ"] else "the same"
                    lines.append(f"  {name:28} logits {says}, {found['compared']} nodes compared")
                    lines += [f"    {each}: {len(nodes)}, {nodes[0]}" for each, nodes in found["begun"].items()]
        elif kind == "plant":
            lines.append(f"  {result['layers']} layers, {result['trunk_gb']:.1f} GB, head {result['mtp_gb']:.1f} GB")
            lines[-1] += f", written in {result['seconds']:.0f} s"
        elif kind == "costs":
            lines += [f"  v({n}) = {v:.2f}  {result['verify_ms'][n]:8.2f} ms" for n, v in result["v"].items()]
            lines.append(f"  c    = {result['c']:.2f}  {result['step_ms']:8.2f} ms")
            for name, times in (("verify", result["verify_in_turn_ms"]), ("step", result["step_in_turn_ms"])):
                each = ", ".join(f"{n} rows {ms:.2f} ms" for n, ms in times.items())
                lines.append(f"  {name}, shapes in turn: {each}")
            lines.append(f"  trunk and head: {result['memory_mib']:.0f} MiB of GPU memory")
            lines.append(f"  step with its logits copied: {result['step_logits_ms']:.2f} ms")
        elif kind == "cycle":
            for name, spent in result.items():
                if isinstance(spent, dict):
                    lines.append(f"  {name}, ms per token (calls per token)")
                    lines += [f"    {what:22} {row['ms']:7.3f} ({row['calls']:.2f})" for what, row in spent.items()]
        elif kind == "kernels":
            for name, seen in result.items():
                if isinstance(seen, dict):
                    lines.append(
                        f"  {name}: {seen['wall_us']:.0f} us, on the GPU {seen['gpu_us']:.0f} in {seen['launched']:.0f}"
                    )
                    lines += [f"    {us:8.1f} us {n:7.1f} {kernel}" for kernel, n, us in seen["kernels"]]
        elif kind in ("middle", "contest", "servers"):
            lines += contest(result)
    return "\n".join(lines).lstrip("\n") + "\n"


def contest(result: dict[str, Any]) -> list[str]:
    head = (
        f"  {'':14} {'tok/s':>8} {'ms/tok':>7} {'ratio':>6} {'(least, greatest)':>18} {'text':>6} {'MiB':>7}  accepted"
    )
    lines = [head]
    for name, row in result.items():
        if not isinstance(row, dict) or name == "plain run":
            continue
        if "ratio" not in row:
            lines.append(f"  {name:14} did not survive: {row['did not survive']}")
            continue
        spread = f"({row['least']:.2f}, {row['greatest']:.2f})"
        line = f"  {name:14} {row['tokens_per_s']:8.1f} {1000 / row['tokens_per_s']:7.2f} {row['ratio']:6.2f}"
        line += f" {spread:>18} {'same' if row['same_text'] else 'OTHER':>6} {row.get('memory_mib', 0):7.0f}"
        if "accepted" in row:
            line += f"  {row['accepted']}, {row['tokens_per_cycle']:.2f} tokens a cycle"
        if "verify_ms" in row:
            line += f", verify {row['verify_ms']:.2f} ms, step {row['step_ms']:.2f} ms"
        lines.append(line)
    return lines
