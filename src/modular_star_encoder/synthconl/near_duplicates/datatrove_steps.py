"""The stage as tasks of datatrove's executors (local, Slurm, Ray), for more rows than one machine should do.

Datatrove's own MinHash blocks are not used: they shingle words, take every shared band for a duplicate without
comparing the texts, and close clusters over that. Its executors run our tasks. The machines share a file system.

    job = prepare_job("rows", "deduplicated", columns=["code", "translation"], id_column="id")
    executor = None
    for name, step, tasks in near_duplicate_steps(job, compare_tasks=200):
        options = {"tasks": tasks, "depends": executor, "logging_dir": f"logs/{name}"}
        executor = SlurmPipelineExecutor([step], **options, time="4:00:00", partition="cpu")
    executor.run()

With `LocalPipelineExecutor` it is the same call with `workers=` in place of what Slurm asks for.
"""

from typing import Any

from modular_star_encoder.synthconl.near_duplicates.job import DuplicateJob

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("This needs datatrove: pip install 'modular-star-encoder[dataset,datatrove]'.") from error

_MAX_TASKS = 1000


class NearDuplicateStep(PipelineStep):
    """One kind of task of a job; it takes no documents and yields none."""

    type = "DEDUP"

    def __init__(self, job: DuplicateJob, task: str, compare_tasks: int) -> None:
        """`task` is the name of one of the job's."""
        super().__init__()
        self.name = f"near-duplicates: {task}"
        self.job, self.task, self.compare_tasks = job, task, compare_tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do this rank's share of the task."""
        with self.track_time():
            if self.task in ("fingerprint", "write"):
                for shard in range(rank, len(self.job.shards), world_size):
                    getattr(self.job, self.task)(shard)
            elif self.task == "compare":
                for part in range(rank, self.compare_tasks, world_size):
                    self.job.compare(part, self.compare_tasks)
            elif rank == 0:
                getattr(self.job, self.task)(*([self.compare_tasks] if self.task == "decide" else []))


def near_duplicate_steps(job: DuplicateJob, compare_tasks: int = 16) -> list[tuple[str, NearDuplicateStep, int]]:
    """The steps of a job in order, each to be run after the one before: their names, and numbers of tasks.

    Args:
        job: As made by `prepare_job`, on the machine that starts the executors.
        compare_tasks: Into how many tasks the comparison of pairs is divided; the same when a job is continued.
    """
    shards = min(len(job.shards), _MAX_TASKS)
    tasks = {"fingerprint": shards, "propose": 1, "compare": compare_tasks, "decide": 1, "write": shards, "finish": 1}
    return [(name, NearDuplicateStep(job, name, compare_tasks), count) for name, count in tasks.items()]
