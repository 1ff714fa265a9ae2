; ioapic: its pin 11 leads to vector 0x60
;@ entry real16
%include "real16.inc"
start:
    call pics_off
    call apic_on
    mov ax, 0x60
    mov bx, apic_tick
    call set_vector
    call be_moved
    mov bl, 1
    call wait_for_ticks
    jmp passed
