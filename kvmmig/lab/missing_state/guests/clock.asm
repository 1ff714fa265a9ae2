; clock: kvmclock never goes back
;@ entry real16
%include "real16.inc"
CLOCK equ 0xa000                ; struct pvclock_vcpu_time_info, whose system_time is at 16
HIGH equ 0xa014                 ; its upper half
start:
    mov ecx, 0x4b564d01         ; KVM_SYSTEM_TIME_NEW
    xor edx, edx
    mov eax, CLOCK + 1
    wrmsr
    mov ebp, dword [HIGH]
    call be_moved
    cmp dword [HIGH], ebp
    jb failed
    jmp passed
