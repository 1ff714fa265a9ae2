; int 14h, the serial port itself: COM1 only

int14:
    SERVICE
    test dx, dx
    jnz .unserved
    cmp ah, 0x01
    je .send
    cmp ah, 0x02
    je .receive
    cmp ah, 0x00                            ; its speed does not matter here
    je .status
    cmp ah, 0x03
    je .status
.unserved:
    UNSERVED 0x14
.send:
    call type_raw
    mov byte [bp + C_AX + 1], 0x60
    jmp leave_service
.receive:
    call wait_for_byte
    mov ah, 0x60
    mov [bp + C_AX], ax
    jmp leave_service
.status:
    mov dx, SERIAL + 5
    in al, dx
    mov ah, al
    mov al, 0xb0
    mov [bp + C_AX], ax
    jmp leave_service
