"""Where a step's time goes: a torch.profiler trace of a few steps, taken in the middle of a real run."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

FIRST_STEPS = 3  # compile kernels, fill caches, start loading processes: not part of a trace
WARM_UP_STEPS = 1  # the profiler's own
TABLE_ROWS = 20


def profiled(
    batches: Iterator[dict], num_steps: int, num_parts: int, output: str | Path, say: Callable[[str], None]
) -> Iterator[dict]:
    """The same batches; on the way `num_steps` steps are recorded, each from asking for its batch to the next asking.

    Steps 5 to 4 + `num_steps` of this process are recorded; a run that ends earlier leaves what there is.

    Args:
        num_parts: batches that make one step.
        output: file ending in .json.gz, written once; opens in chrome://tracing and ui.perfetto.dev.
        say: prints the table of the costliest operators and the path of the trace.
    """
    has_cuda, output = ProfilerActivity.CUDA in supported_activities(), Path(output)

    def write(recorded: profile) -> None:
        order = "self_device_time_total" if has_cuda else "self_cpu_time_total"
        say(recorded.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=40))
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=output.parent) as folder:
                recorded.export_chrome_trace(str(Path(folder) / output.name))
                (Path(folder) / output.name).replace(output)
            say(f"trace of {num_steps} steps: {output} (ui.perfetto.dev or chrome://tracing)")
        except OSError as error:  # a full disk does not end the training
            say(f"warning: no trace, {output} cannot be written: {error}")

    plan = schedule(wait=FIRST_STEPS, warmup=WARM_UP_STEPS, active=num_steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as recorder:
        for number, batch in enumerate(batches):
            if number and number % num_parts == 0:
                recorder.step()
            yield batch
