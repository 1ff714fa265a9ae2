; pic-master: an interrupt waits in it, under a vector of the guest's choice
;@ entry real16
%include "real16.inc"
start:
    mov dl, 0xdf                ; IRQ 5 alone
    mov dh, 0xff
    call pics_on
    mov ax, 0x65
    mov bx, pic_tick
    call set_vector
    call be_moved
    in al, 0x21
    cmp al, 0xdf
    jne failed
    mov bl, 1
    call wait_for_ticks
    jmp passed
