"""Every MSR matters that can have a value of its own, whether a guest here sees it or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from kvmmig.errors import KvmError
from kvmmig.kvm import Vcpu
from kvmmig.lab.missing_state.acts import TSC, msr, msr_values
from kvmmig.lab.missing_state.proof import CONFIG
from kvmmig.lab.missing_state.proofs import SYSTEM_TIME
from kvmmig.machine import Machine

from .lab import fresh, state_of

pytestmark = pytest.mark.kvm


def change(vcpu: Vcpu, index: int) -> bool:
    """Give an MSR another value than it has; False if there is none that KVM takes and keeps."""
    before = vcpu.get_msrs([index])[index]
    for bit in range(64):
        try:
            vcpu.set_msrs({index: before ^ 1 << bit})
        except KvmError:
            continue
        if vcpu.get_msrs([index])[index] == before ^ 1 << bit:
            return True
    return False


async def test_every_msr_that_can_have_another_value_is_restored_and_is_not_without_its_entry() -> None:
    with trio.fail_after(120):
        async with Machine.open(CONFIG) as source:
            # The TSC runs, so it has a guest to prove it; and kvmclock's older number is its newer one.
            indices = msr_values(state_of(source)["cpu0/msrs"].data).keys() - {TSC, SYSTEM_TIME[0]}
            changed = sorted(index for index in indices if change(source.vcpus[0], index))
            stuck = sorted(indices - set(changed))
            sections = state_of(source)
            saved = msr_values(sections["cpu0/msrs"].data)

            async with Machine.open(CONFIG, description=source.description) as twin:
                await twin.apply(sections.values())
                restored = msr_values(state_of(twin)["cpu0/msrs"].data)
            assert {index: restored[index] for index in changed} == {index: saved[index] for index in changed}

            for index in changed:
                lost = SYSTEM_TIME if index in SYSTEM_TIME else (index,)
                async with Machine.open(CONFIG, description=source.description) as twin:
                    default = fresh(twin, "cpu0/msrs")
                    spoilt = replace(
                        sections["cpu0/msrs"], data=msr(*lost)(sections["cpu0/msrs"].data, default)
                    )
                    await twin.apply((sections | {"cpu0/msrs": spoilt}).values())
                    lacking = msr_values(state_of(twin)["cpu0/msrs"].data)
                assert lacking[index] != saved[index], f"nobody misses MSR {index:#x}"
    print("restored:", *(f"{index:#x}" for index in changed))
    print("of one value here, whatever is written:", *(f"{index:#x}" for index in stuck))
