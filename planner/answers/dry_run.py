"""What a dry run of a program answers. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from attention.config import Value, as_tuple


class Holder(Value):
    """Tensors that were made in one place of the program."""

    where: str
    bytes: int
    """As requested, before the allocator rounds."""
    tensors: int


Holders = Annotated[tuple[Holder, ...], BeforeValidator(as_tuple)]


class StepPeak(Value):
    """Peaks so far when an optimizer had done a step."""

    number: int
    seconds: float
    """Since torch was imported."""
    allocated: int
    reserved: int
    retries: int
    """Times that the allocator gave its cache back and tried again."""


class OutOfMemory(Value):
    """An allocation that failed."""

    gpu: int
    requested: int
    """Bytes that were asked for."""
    free: int
    """Bytes that the card had left."""
    short: int
    """Bytes that were missing at least; 0 where the card had enough, and a limit of the program's own or
    fragmentation kept them."""
    where: str
    step: int
    """Optimizer steps that had been done."""
    caught: bool
    """Whether the program went on."""


class GpuUse(Value):
    """What the program took of one card."""

    gpu: int
    total: int
    """Bytes of the card."""
    allocated: int
    """Peak of tensors, as the allocator counts them."""
    reserved: int
    """Peak of segments."""
    device: int
    """Peak of what the card loses: segments and contexts."""
    processes: int = 1
    """Processes that used it at the same time; their peaks are added up."""


class DryRun(Value):
    """A program that ran on a card that is not there. Bytes are those of the fullest card."""

    schema_version: Literal[1] = 1
    command: Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
    gpu: str
    """The card by its key."""
    torch: str
    """The build that ran."""
    allocator: str
    exit_code: int
    """3 where memory ran out and nothing caught it, else the program's own; 128 and a signal's number where
    one ended it."""
    used: bool
    """Whether the program used a card at all."""
    allocated: int
    reserved: int
    device: int
    left: int
    """Bytes of the card beside `device`."""
    retries: int
    out_of_memory: OutOfMemory | None
    """The first that nothing caught, or else the last that was caught."""
    largest: Holders
    """What held memory at the peak of tensors, largest first."""
    steps: Annotated[tuple[StepPeak, ...], BeforeValidator(as_tuple)]
    """Of the process that took most, at most a thousand, the last among them."""
    stepped: int
    """Steps of that process in all; several optimizers count each."""
    gpus: Annotated[tuple[GpuUse, ...], BeforeValidator(as_tuple)]
    warnings: Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
    """What may make a real run differ, with its places in the program."""
    unknown: Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
    """What takes memory on a card and is not in these figures, by name."""
    stopped: bool
    """Whether it was ended after as many steps as were asked for."""
    error: str
    """What ended the program, where an exception did."""
    snapshot: str | None
    seconds: float
