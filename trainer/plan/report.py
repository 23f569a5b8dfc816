"""The plan as one dictionary, and as a table for people."""

from __future__ import annotations

from typing import Any

from longspan.trainer.plan.hardware import Hardware
from longspan.trainer.plan.memory import GIB, KERNEL_HEAD_WIDTHS, Memory, plan_memory
from longspan.trainer.plan.parameters import count_parameters, paper_count, total_parameters
from longspan.trainer.plan.setting import Setting, runs_by_block
from longspan.trainer.plan.timing import StepTime, plan_step


def make_plan(setting: Setting, hardware: Hardware) -> dict[str, Any]:
    """Everything that `longspan plan --json` prints.

    Memory is in GiB: `total_gib` is the peak of allocated memory, `reserved_gib` what the caching allocator and the
    context take beside it included. Times are in seconds, of one optimizer step on one device.
    """
    memory, step = plan_memory(setting), plan_step(setting, hardware)
    reserved = memory.total / GIB * (1 + hardware.allocator_slack) + hardware.context_gib
    total = total_parameters(setting.model)
    return {
        "model": setting.model.name,
        "setting": {
            "rows": setting.rows,
            "segment_tokens": setting.segment_tokens,
            "micro_batches": setting.micro_batches,
            "vocab_size": setting.model.vocab_size,
            "precision": setting.precision,
            "activation_checkpointing": setting.checkpointing,
            "optimizer": setting.optimizer,
            "zero_stage": setting.zero_stage,
            "devices": 1,
        },
        "parameters": {"total": total, "paper_count": paper_count(setting.model), **count_parameters(setting.model)},
        "memory": {
            "total_gib": memory.total / GIB,
            "reserved_gib": reserved,
            "fits": reserved <= hardware.memory_gib,
            **{name: value / GIB for name, value in vars(memory).items()},
        },
        "step": _step(step, total, hardware),
        "hardware": {
            "name": hardware.name,
            "memory_gib": hardware.memory_gib,
            "peak_tflops": hardware.matrix.peak_tflops,
        },
        "assumptions": assumptions(setting, hardware, memory, step),
    }


def _step(step: StepTime, parameters: int, hardware: Hardware) -> dict[str, Any]:
    peak = hardware.matrix.peak_tflops * 1e12
    return {
        "seconds": step.seconds,
        "tokens": step.tokens,
        "tokens_per_second": step.tokens / step.seconds,
        "model_flops": step.model_flops,
        "share_of_matrix_rate": 6.0 * parameters * step.tokens / step.seconds / peak,
        "device_seconds": step.device * step.micro_batches,
        "host_seconds": step.host * step.micro_batches,
        "update_seconds": step.update,
        "engine_seconds": step.engine,
        "bound_by": "device" if step.device >= step.host else "host",
        "by_part": [
            {
                "part": name,
                "forward_seconds": step.micro_batches * part.forward,
                "backward_seconds": step.micro_batches * part.backward,
                "flops": step.micro_batches * part.flops,
                "bytes": step.micro_batches * part.num_bytes,
            }
            for name, part in step.parts.items()
        ],
    }


def assumptions(setting: Setting, hardware: Hardware, memory: Memory, step: StepTime) -> list[str]:
    """What the plan takes for granted, and which rates have not been measured."""
    lines = ["one device; every token of a segment counts; kernels in their Triton forms, compiled already"]
    if setting.optimizer == "none":
        lines.append("forward and backward only: no optimizer state, no update")
    if setting.micro_batches > 1:
        lines.append(f"{setting.micro_batches} micro-batches a step, gradients kept between them")
    mixers = {layer.mixer for layer in setting.model.layers}
    for name in sorted(mixers & {"full_attention", "linear_attention"}):
        lines.append(f"{name} runs as plain PyTorch: its memory and time are rough")
    lines += width_notes(setting)
    if runs_by_block(setting.model):
        lines.append("the stack is serial over blocks (memory or feedback): its time is rough")
    if setting.precision == "fp32":
        lines.append("fp32: attention is taken at half its bf16 rate")
    if setting.offload_optimizer:
        lines.append(f"the optimizer's state is in the host's memory; {hardware.offload.source}")
    if step.host > step.device:
        # the blocks of such a stack are launched one by one: twice the segment, twice the launches
        free = "a larger micro-batch is" if runs_by_block(setting.model) else "a larger micro-batch or segment is"
        lines.append(
            f"launching kernels takes longer ({1e3 * step.host:.0f} ms a micro-batch) than running them "
            f"({1e3 * step.device:.0f} ms): {free} free, up to {step.host / step.device:.1f} times the tokens"
        )
    if memory.total / GIB > hardware.memory_gib:
        lines.append("does not fit: lower the micro-batch, or set training.activation_checkpointing to layer")
    lines += [f"rate not measured yet: {text}" for text in hardware.estimated()]
    return lines


def width_notes(setting: Setting) -> list[str]:
    """What to know of heads that no kernel takes: one line, or none."""
    mixers = sorted({layer.mixer for layer in setting.model.layers} & {"block_recurrent", "sliding_window"})
    width = setting.model.head_dim
    if not mixers or width in KERNEL_HEAD_WIDTHS:
        return []
    return [
        f"heads of width {width} have no kernel ({', '.join(map(str, KERNEL_HEAD_WIDTHS))} have): "
        f"{' and '.join(mixers)} run as plain PyTorch, slower and with more memory than planned from the kernels"
    ]


def text(plan: dict[str, Any]) -> str:
    """The plan as lines for a terminal."""
    setting, parameters, memory, step = (plan[name] for name in ("setting", "parameters", "memory", "step"))
    kinds = {name: value for name, value in parameters.items() if name not in ("total", "paper_count")}
    lines = [
        f"{plan['model']}: {setting['rows']} x {setting['segment_tokens']} tokens x {setting['micro_batches']} "
        f"micro-batches, {setting['precision']}, checkpointing {setting['activation_checkpointing']}, "
        f"optimizer {setting['optimizer']}, on one {plan['hardware']['name']}",
        "",
        f"{'Parameters':<34}{parameters['total']:>14,}   as papers count them {parameters['paper_count']:,}",
        *(f"  {name.replace('_', ' '):<32}{value:>14,}" for name, value in kinds.items()),
        "",
        f"{'Memory, peak':<34}{memory['total_gib']:>10.2f} GiB   with slack and context "
        f"{memory['reserved_gib']:.2f} of {plan['hardware']['memory_gib']:.1f} GiB"
        f"{'' if memory['fits'] else ': does not fit'}",
        *(f"  {name:<32}{memory[name]:>10.2f} GiB" for name in Memory.__dataclass_fields__),
        "",
        f"{'Step':<34}{1e3 * step['seconds']:>10.1f} ms    {step['tokens_per_second']:,.0f} tokens/s, "
        f"{100 * step['share_of_matrix_rate']:.1f}% of {plan['hardware']['peak_tflops']:.0f} TFLOP/s "
        f"(6 x parameters x tokens), bound by the {step['bound_by']}",
        f"  {'part':<38}{'forward':>10}{'backward':>10}{'TFLOP':>8}{'GB':>8}",
    ]
    for part in step["by_part"]:
        forward, backward = 1e3 * part["forward_seconds"], 1e3 * part["backward_seconds"]
        counts = f"{part['flops'] / 1e12:>8.2f}{part['bytes'] / 1e9:>8.1f}"
        lines.append(f"  {part['part']:<38}{forward:>7.1f} ms{backward:>7.1f} ms{counts}")
    if step["update_seconds"]:
        lines.append(f"  {'update':<38}{1e3 * step['update_seconds']:>7.1f} ms")
    if step["engine_seconds"]:
        lines.append(f"  {'around the update, on the host':<38}{1e3 * step['engine_seconds']:>7.1f} ms")
    if step["bound_by"] == "host":
        wait = step["host_seconds"] - step["device_seconds"]
        lines.append(f"  {'waiting for launches':<38}{1e3 * wait:>7.1f} ms")
    return "\n".join([*lines, "", "Assumed:", *(f"  {line}" for line in plan["assumptions"])])
