; mp-state: is halted, and finds out whether an interrupt woke it
;@ entry real16
%include "real16.inc"
start:
    call pics_off
    call apic_on
    mov ax, 0x60
    mov bx, apic_tick
    call set_vector
    mov byte [READY], 1
    sti
    hlt
    cli
    cmp byte [TICKS], 1
    jne failed
    jmp passed
