; tsc-deadline: sets the timer to a moment half a second ahead, and to the next one when it came
;@ entry real16
%include "real16.inc"
start:
    call apic_on
    mov ax, 0x60
    mov bx, deadline
    call set_vector
    mov ecx, X2APIC_TIMER
    xor edx, edx
    mov eax, 0x40060            ; TSC deadline, vector 0x60
    wrmsr
    call arm
    mov byte [READY], 1
    sti
until_moved:
    cmp byte [GO], 0
    je until_moved
    mov bl, 1
    call wait_for_all_ticks
    jmp passed

arm:
    rdtsc
    add eax, 0x40000000
    adc edx, 0
    mov ecx, 0x6e0
    wrmsr
    ret

deadline:
    push eax
    push ecx
    push edx
    cmp byte [GO], 0
    jne moved
    call arm
    dec byte [TICKS]            ; only those after the move count
moved:
    pop edx
    pop ecx
    pop eax
    jmp apic_tick
