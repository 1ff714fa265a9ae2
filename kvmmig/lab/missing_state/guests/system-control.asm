; system-control: A20 was switched on through port 0x92
;@ entry real16
%include "real16.inc"
start:
    mov al, 2
    out 0x92, al
    call be_moved
    in al, 0x92
    cmp al, 2
    jne failed
    jmp passed
