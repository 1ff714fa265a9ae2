; wall-clock: KVM writes the time of its boot, in seconds since 1970, to where it says
;@ entry real16
%include "real16.inc"
WALL_CLOCK equ 0x4b564d00       ; MSR_KVM_WALL_CLOCK_NEW
PAGE equ 0xb000                 ; struct pvclock_wall_clock, whose seconds are at 4
SECONDS equ 0xb004
start:
    mov ecx, WALL_CLOCK
    xor edx, edx
    mov eax, PAGE
    wrmsr
    mov ebp, dword [SECONDS]
    call be_moved
    mov ecx, WALL_CLOCK
    rdmsr
    cmp eax, PAGE
    jne failed
    mov eax, dword [SECONDS]
    sub eax, ebp                ; kvmclock stood still meanwhile, so it may be a little later
    cmp eax, 10000
    ja failed
    jmp passed
