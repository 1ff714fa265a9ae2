; pit: its channel 0 ticks, and goes on ticking when it has been moved
;@ entry real16
%include "real16.inc"
start:
    mov dl, 0xfe                ; IRQ 0 alone
    mov dh, 0xff
    call pics_on
    mov ax, 0x60
    mov bx, pic_tick
    call set_vector
    mov al, 0x34                ; channel 0, both bytes, rate generator
    out 0x43, al
    mov al, 0xa9                ; 1193 = 1 ms
    out 0x40, al
    mov al, 0x04
    out 0x40, al
    call be_moved
    mov bl, 3                   ; one might have waited in the PIC
    call wait_for_ticks
    jmp passed
