"""The probability flow by an adaptive Runge-Kutta method, each picture with steps of its own.

In z = alpha x of the variance-preserving law, alpha = 1 / sqrt(1 + sigma^2), and lambda = -log sigma,
dx / dsigma = (x - D) / sigma reads

    dz / dlambda = alpha (D - alpha z).

Its terms are never larger than the data: z is near unit variance throughout, and nothing happens while sigma is huge.
So one tolerance is right from beginning to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import cast

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.sampling.step import Noise, Sampler, Step, flow, level, trajectory

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(time (B,), y (B, ...)) -> dy / dtime (B, ...), each row by itself."""


def ode(rtol: float = 1e-5, atol: float = 1e-5) -> Sampler:
    """The flow's own solution, by Dormand & Prince's pair of orders 5 and 4 (torchdiffeq's dopri5).

    `rtol`, `atol`: the error allowed in one step, relative and absolute, as a root mean square over the picture in z.
    The defaults are those of Song et al. 2021, appendix D. The grid says where the state is looked at, and the
    solver begins anew at each level: at least 8 evaluations for each interval, and one for the step to 0, which is
    Euler's. A batch is evaluated until its slowest picture is there. No gradient flows through the solver.

    Raises UserError for tolerances that are not positive, and where the solver cannot go on.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} of ode is {value:g}; choose a small positive number, such as 1e-5")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            if sigma_next == 0:
                x0 = denoiser(x, level(sigma))
                return flow(x, x0, sigma, 0.0), x0
            first: list[Tensor] = []

            def velocity(time: Tensor, z: Tensor) -> Tensor:
                now = (-time).exp()
                alpha = per_picture((1 + now**2).rsqrt(), z)
                x0 = denoiser(z / alpha, now)
                first.extend([x0] if not first else [])
                return alpha * (x0 - alpha * z)

            ends = -math.log(sigma), -math.log(sigma_next)
            try:
                z = integrate(velocity, x / math.hypot(1, sigma), *ends, rtol, atol)
            except AssertionError as error:  # torchdiffeq's: the step has shrunk to nothing, or the state is not finite
                raise UserError(
                    f"ode cannot go on between sigma {sigma:g} and {sigma_next:g} ({str(error)[:60]}); choose larger "
                    "tolerances, or another sampler if it is the model's prediction that is not finite"
                ) from error
            return z * math.hypot(1, sigma_next), first[0]

        return trajectory(x, sigmas, advance)

    return sample


def integrate(velocity: Velocity, y: Tensor, begin: float, end: float, rtol: float, atol: float) -> Tensor:
    """`y` (B, ...) carried from `begin` to `end` > begin by dopri5, each row with its own steps and its own error.

    A row's result does not depend on what the other rows hold. torchdiffeq chooses one step for all that it is given
    and calls for the velocity itself, so each row has a solver in a thread; here, in the caller's thread, the velocity
    is evaluated for all that wait, in one batch of always B rows (a row that has arrived stands where it asked last).
    """
    from torchdiffeq import odeint  # here, since nothing else needs it

    rows = range(len(y))
    ends = torch.tensor([begin, end], dtype=y.dtype, device=y.device)
    questions: list[tuple[Tensor, Tensor]] = [(ends[0], y[row]) for row in rows]
    asked: SimpleQueue[int | None] = SimpleQueue()
    answers: list[SimpleQueue[Tensor | None]] = [SimpleQueue() for _ in rows]
    stream = torch.cuda.current_stream(y.device) if y.is_cuda else None  # a thread would begin on the default one
    inference = torch.is_inference_mode_enabled()

    def ask(row: int, time: Tensor, point: Tensor) -> Tensor:
        questions[row] = time, point
        asked.put(row)
        answer = answers[row].get()
        if answer is None:
            raise RuntimeError("the evaluation failed; its own error follows")
        return answer

    def solve(row: int) -> Tensor:
        # The solver may not step beyond the end, where the denoiser was perhaps never trained.
        options = {"step_t": ends[1:], "dtype": y.dtype}
        try:
            with torch.inference_mode(inference), torch.no_grad(), torch.cuda.stream(stream):
                question = partial(ask, row)
                states = odeint(question, y[row], ends, rtol=rtol, atol=atol, method="dopri5", options=options)
                return cast(Tensor, states)[-1]
        finally:
            asked.put(None)

    with ThreadPoolExecutor(len(y)) as pool:
        solutions = [pool.submit(solve, row) for row in rows]
        running = len(y)
        try:
            while running:
                waiting = [asked.get() for _ in range(running)]  # each that runs asks once, or ends
                running -= waiting.count(None)
                if running:
                    times, points = zip(*questions, strict=True)
                    slopes = velocity(torch.stack(times), torch.stack(points))
                    for row in waiting:
                        if row is not None:
                            answers[row].put(slopes[row])
        except BaseException:
            for answer in answers:
                answer.put(None)
            raise
        return torch.stack([solution.result() for solution in solutions])
