; serial: the registers of the UART, and forty bytes that it has not read yet
;@ entry real16
%include "real16.inc"
start:
    mov dx, 0x3fb               ; LCR: the divisor's latch
    mov al, 0x83
    out dx, al
    mov dx, 0x3f8
    mov al, 0x39
    out dx, al
    inc dx
    mov al, 0x05
    out dx, al
    mov dx, 0x3fb
    mov al, 0x1b
    out dx, al
    mov dx, 0x3fa               ; FIFOs on, a trigger of 8
    mov al, 0x81
    out dx, al
    mov dx, 0x3fc               ; RTS and DTR
    mov al, 0x03
    out dx, al
    mov dx, 0x3f9
    mov al, 0x01
    out dx, al
    mov dx, 0x3ff
    mov al, 0xa5
    out dx, al
    call be_moved

    mov dx, 0x3f9
    in al, dx
    cmp al, 0x01
    jne failed
    inc dx                      ; IIR: FIFOs on, and data over the trigger
    in al, dx
    cmp al, 0xc4
    jne failed
    inc dx
    in al, dx
    cmp al, 0x1b
    jne failed
    inc dx
    in al, dx
    cmp al, 0x03
    jne failed
    mov dx, 0x3ff
    in al, dx
    cmp al, 0xa5
    jne failed
    mov dx, 0x3fb
    mov al, 0x9b
    out dx, al
    mov dx, 0x3f8
    in al, dx
    cmp al, 0x39
    jne failed
    inc dx
    in al, dx
    cmp al, 0x05
    jne failed
    mov dx, 0x3fb
    mov al, 0x1b
    out dx, al

    xor bl, bl
more:
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz failed
    mov dx, 0x3f8
    in al, dx
    cmp al, bl
    jne failed
    inc bl
    cmp bl, 40
    jne more
    jmp passed
