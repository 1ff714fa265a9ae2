; pic-slave: an interrupt waits in it, under a vector of the guest's choice
;@ entry real16
%include "real16.inc"
start:
    mov dl, 0xfb                ; the cascade
    mov dh, 0xf7                ; IRQ 11 alone
    call pics_on
    mov ax, 0x73
    mov bx, pic_tick
    call set_vector
    call be_moved
    in al, 0xa1
    cmp al, 0xf7
    jne failed
    mov bl, 1
    call wait_for_ticks
    jmp passed
